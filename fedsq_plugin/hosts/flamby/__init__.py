"""FLamby as a host. Importing this package does not import FLamby."""
