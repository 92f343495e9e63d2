"""Measurements that back the claims in docs/; never run as tests."""
