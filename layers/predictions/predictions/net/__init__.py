"""HTTP to and from strangers: checked addresses, guarded clients, webhook signatures."""
