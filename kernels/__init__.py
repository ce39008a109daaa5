"""Attention kernels: arrays in, arrays out. Nothing here knows masks, strategies or models."""
