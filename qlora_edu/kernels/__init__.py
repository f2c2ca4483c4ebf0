"""Fast paths. Each stands for a plain line of torch elsewhere in the package, and a test holds the two equal."""
