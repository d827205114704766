"""What lets generated kernel texts compile and run on a CPU, without a GPU."""
