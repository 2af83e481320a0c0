"""Files with parameters: reading, matching, writing, resuming, exporting."""
