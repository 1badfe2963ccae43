"""Workers on a Ray cluster, or on this machine's cores. Nothing else of ``fitness`` imports Ray."""
