"""One chain with everything about shapes settled (``plan``), and its autograd function (``run``)."""
