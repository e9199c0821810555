"""The books: one writer over SQL, published as Parquet for everyone to read."""
