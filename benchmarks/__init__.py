"""Latency, throughput, trade-off tables and comparisons with peers."""
