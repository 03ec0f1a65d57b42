"""What both data planes use: durable files, names on the wire, the tgt target daemon, who holds a device open."""
