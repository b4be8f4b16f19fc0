"""HTTP to and from untrusted hosts: checked addresses, guarded clients, webhook signatures."""
