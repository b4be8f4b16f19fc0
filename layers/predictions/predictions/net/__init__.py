"""HTTP with untrusted hosts: checked addresses, guarded clients, signatures."""
