"""Jobs that need several rooms; what a verb, a service and Python share."""
