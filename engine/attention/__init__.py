"""Paged attention: one interface, one backend per kind of device."""
