"""What every host shares: roles of state keys, local update, aggregation, seeds, partition."""
