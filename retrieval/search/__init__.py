"""Search in a corpus, in memory or in a vector database."""
