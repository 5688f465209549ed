"""Fuse: distributions of several models distilled into one."""
