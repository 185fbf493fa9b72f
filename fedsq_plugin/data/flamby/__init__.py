"""FLamby's packages as a source of data."""
