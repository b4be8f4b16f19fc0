"""AWS clients and what the library does with each service, without knowledge of predictions."""
