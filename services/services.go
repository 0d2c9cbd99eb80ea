// Package services is the place of the single system image's services, one
// package each: membership, pids and capabilities, migration, scheduling,
// checkpoints, remote memory. A service never imports another's insides; it
// declares the small interface it needs where it uses it, and the node daemon
// (node/pid1) brings them together.
package services
