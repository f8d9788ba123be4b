"""Binary units. Like safelight/errors.py, every room may import this module."""

MIB = 2**20
GIB = 2**30
