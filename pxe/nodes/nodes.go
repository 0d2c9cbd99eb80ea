// Package nodes is the head node's memory of its machines: which MAC has which
// Kerrighed node id, host name and address, who holds a lease, and how far each
// machine has come in its boot.
//
// A machine gets its id in one of two ways. The node table of cluster.yaml names
// it, or discovery hands out the lowest free id of nodes.discover_ids. A
// discovered id is on disk before the caller may tell the machine about it, and
// it stays with that MAC for good: a restart of the head changes nothing. The
// table always wins: a discovered machine loses an id or an address that the
// table now gives to another one, and is given a new id the next time it asks.
//
// Whether a machine is let in at all is decided by the table, by nodes.unknown,
// and by hand (admission.go).
//
// The DHCP, TFTP and HTTP servers of the head and the nodes themselves report
// the stages of a boot; Watch hands every change to whoever shows them. The
// package opens no socket and never talks to a node.
package nodes

import (
	"errors"
	"net/netip"
	"time"

	"krgimage/configs"
)

// ErrRefused says that a MAC is not in the node table and that the policy is to
// refuse it.
var ErrRefused = errors.New("not in the node table (nodes.table), and nodes.unknown is refuse")

// ErrWaiting says that a MAC is not in the node table and waits to be admitted by
// hand.
var ErrWaiting = errors.New("not in the node table (nodes.table), and nodes.unknown is manual: 'krgimage nodes admit MAC' lets it in")

// ErrRevoked says that a machine was locked out by hand.
var ErrRevoked = errors.New("revoked: 'krgimage nodes admit MAC' lets it in again")

// ErrNoMachine says that there is no machine with a MAC or an id.
var ErrNoMachine = errors.New("no such machine; 'krgimage nodes' shows those that there are")

// ErrNoFreeID says that discovery has no id left to give.
var ErrNoFreeID = errors.New("no free node id: widen nodes.discover_ids or remove machines that are gone from the node file")

// Source says where a machine's id comes from.
type Source string

const (
	FromTable  Source = "table"      // a row of nodes.table in cluster.yaml
	Discovered Source = "discovered" // handed out by discovery
)

// Admission is what was decided by hand about a machine.
type Admission string

const (
	ByPolicy Admission = ""         // nothing: the table and nodes.unknown decide
	Admitted Admission = "admitted" // let in
	Revoked  Admission = "revoked"  // locked out: no address, no boot files, no membership
	Waiting  Admission = "waiting"  // nothing yet, and nodes.unknown is manual
)

// NoID is the id of a machine that waits and never had one.
const NoID = -1

// Node is what the head knows of one machine. It is a value: changing a copy
// changes nothing.
type Node struct {
	MAC      configs.MAC `json:"mac"`
	ID       int         `json:"id"`
	Hostname string      `json:"hostname"`
	Address  netip.Addr  `json:"address"`
	Source   Source      `json:"source"`

	Admission Admission `json:"admission,omitempty"`

	// FirstSeen is when the machine first asked for an address; zero for a row
	// of the table that never booted.
	FirstSeen time.Time `json:"first_seen,omitzero"`

	// LeaseUntil is the end of the lease last granted; zero when the machine
	// never had one or gave it back.
	LeaseUntil time.Time `json:"lease_until,omitzero"`

	// Boot is the timeline of the machine's last boot; nil if it never booted.
	Boot *Boot `json:"boot,omitempty"`
}

// Stage is the last stage the machine reached, or "" if it never booted.
func (n Node) Stage() Stage {
	if n.Boot == nil || len(n.Boot.Events) == 0 {
		return ""
	}
	return n.Boot.Events[len(n.Boot.Events)-1].Stage
}

func (n Node) clone() Node {
	if n.Boot != nil {
		b := n.Boot.clone()
		n.Boot = &b
	}
	return n
}
