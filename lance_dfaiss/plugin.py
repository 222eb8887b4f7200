"""`dataset()`: a LanceDataset whose vector search goes through this package's indexes."""
