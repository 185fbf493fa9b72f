"""Runs over several processes, with FedML's backends MPI, and GRPC across silos."""
