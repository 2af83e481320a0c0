"""Reports: an HTML page about a run, from the files that it wrote."""
