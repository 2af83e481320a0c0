"""Decoded images on disk: format (manifest, index, shards), building, verifying."""
