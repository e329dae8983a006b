//! The server that is moved away from: its catalog, its slot and snapshots, its stream. Knows nothing of the target.
//!
//! The order of a migration is the order of the files: [`catalog`] says what is there, [`scope`] what of it is moved;
//! [`identity`] has rows told apart where nothing does, if that is allowed; [`slot`] makes the publications and the slot;
//! [`snapshot`] says what a copied table has seen; [`receive`] brings the stream into the queue over a [`replication`]
//! session. [`marker`] sends commits of our own, and [`version`] knows what a server's version knows.

pub mod catalog;
pub mod ddl;
pub mod identity;
pub mod marker;
pub mod receive;
pub mod replication;
pub mod scope;
pub mod slot;
pub mod snapshot;
pub mod standby;
pub mod version;
