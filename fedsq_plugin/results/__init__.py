"""What a run leaves on disk, and what is computed, tabulated and plotted from it."""
