//! Every module's configuration in one typed tree.
