"""Control services and what speaks to them: engines, agents, fleets, principals, authorities, and what may go wrong between them."""
