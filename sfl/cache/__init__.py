"""Halves of models as folders on disk, which an edge server packs and a device keeps: by fingerprint, checked, bounded."""
