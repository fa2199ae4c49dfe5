//! What an operator sees of a running proxy: the table of metrics.

mod table;
