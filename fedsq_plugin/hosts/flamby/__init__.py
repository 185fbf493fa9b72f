"""FLamby as a host. Nothing here is mathematics, and FLamby is imported only when asked for."""
