"""The losses in the form that other libraries call, and the embeddings of those libraries' models for the pooling."""
