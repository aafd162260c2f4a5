"""The division of a device: fair shares, the room for a lease, floors and reclaims."""
