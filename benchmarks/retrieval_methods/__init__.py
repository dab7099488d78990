"""What benchmarks/retrieval.py measures, and how; see docs/retrieval.md."""
