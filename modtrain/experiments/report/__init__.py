"""`modtrain report`: a page on what runs came to."""
