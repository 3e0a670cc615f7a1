"""`modtrain inspect`: a page on what the routers do."""
