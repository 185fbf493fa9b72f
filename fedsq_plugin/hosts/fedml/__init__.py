"""FedML 0.9.6 as a host."""
