"""The market's own decisions under a virtual clock, fed with traces."""
