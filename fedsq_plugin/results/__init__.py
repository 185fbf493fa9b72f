"""The files of a run, and the statistics, tables and plots made from them."""
