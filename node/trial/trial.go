// Package trial runs a whole cluster on one machine: QEMU nodes that boot over
// PXE from the head node's own servers, on a network that exists only in this
// process (pxe/vnet). No root, no tap, no bridge, the host stays as it was.
//
// A trial goes like this. Plan names the machines. New finds QEMU, probes which
// accelerator really works, makes the network and takes the loopback ports for
// ssh. Run lets the caller's head node serve on that network, starts the
// machines, and shows each one's way to a login; it ends with its context, and
// with it ends every QEMU. trial.json and a control socket let other processes
// ask and stop (Status, Stop, Control, AttachConsole).
//
// The package doesn't know how the head node works: Head is all it needs of it.
package trial

import (
	"context"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"krgimage/configs"
	"krgimage/images/progress"
)

// Options describes a trial.
type Options struct {
	Dir      string // of the trial in the state directory, e.g. STATE/trial; made when missing
	Session  int    // Kerrighed session id, part of the machines' Ethernet addresses
	Machines []Machine
	Memory   int64 // bytes of each machine
	CPUs     int   // of each machine
	UEFI     bool  // OVMF and its own PXE stack instead of SeaBIOS and iPXE

	// Head is the head node's address and the subnet's prefix length.
	Head    netip.Prefix
	Capture io.Writer // gets every frame as pcap; nil: none

	Accel *Accel // nil: New probes
	// Grace is how long the machines may take to shut down when the trial
	// ends, before their power is cut. 0: it is cut at once.
	Grace time.Duration

	// Ready is called once, when every machine has become ready.
	Ready func(Report)
	// Out and Style say where and how the machines' progress is shown.
	Out   io.Writer
	Style progress.Style
	Log   *slog.Logger
}

// Head is what the trial needs of the head node, which listens on the network
// of the trial (Cluster.Network).
type Head interface {
	// Run serves until ctx ends, and calls ready once everything listens. The
	// machines start after that.
	Run(ctx context.Context, ready func()) error
	// Watch yields a machine's boot each time it got further, until ctx ends.
	Watch(ctx context.Context) iter.Seq[Boot]
}

// Machine is one QEMU node.
type Machine struct {
	ID       int
	Hostname string
	MAC      net.HardwareAddr
	Address  netip.Addr // that the head gives it
}

// Boot is how far one boot of a machine is.
type Boot struct {
	MAC     string
	Started time.Time
	Events  []Event
}

// Event is a stage that a boot reached.
type Event struct {
	Stage  string
	At     time.Time
	Detail string
}

// stages of a machine in the order of a boot. The first is the trial's own:
// QEMU runs and nothing was heard yet. Besides these there are failed (the node
// sits in its rescue console), poweroff, reboot, off (QEMU ended because the
// machine powered off or was told to) and crashed (QEMU ended otherwise).
var stages = []string{
	"firmware", "dhcp", "loader", "ipxe", "script", "kernel", "initramfs",
	"stage1", "link", "lease", "root", "init", "container", "ready",
}

// MAC is the Ethernet address of node id of a session: QEMU's prefix 52:54:00,
// then the session in two bytes and the id.
func MAC(session, id int) net.HardwareAddr {
	return net.HardwareAddr{0x52, 0x54, 0x00, byte(session >> 8), byte(session), byte(id)}
}

// Plan names the machines of a trial with n nodes: ids 1 to n, with the host
// name and address that the configuration has for them.
func Plan(c configs.Cluster, n int) ([]Machine, error) {
	if n < 1 || n > configs.MaxNodeID-1 {
		return nil, fmt.Errorf("a trial has 1 to %d nodes, not %d", configs.MaxNodeID-1, n)
	}
	var machines []Machine
	for id := 1; id <= n; id++ {
		m := Machine{ID: id, Hostname: c.Hostname(id), MAC: MAC(c.SessionID, id)}
		var err error
		if m.Address, err = c.Address(id); err != nil {
			return nil, fmt.Errorf("node %d of the trial: %w; choose a larger network.subnet or fewer nodes", id, err)
		}
		for _, row := range c.Nodes.Table {
			if row.ID != id {
				continue
			}
			if row.Hostname != "" {
				m.Hostname = row.Hostname
			}
			if row.Address.IsValid() {
				m.Address = row.Address
			}
		}
		if m.Address == c.Network.Head {
			return nil, fmt.Errorf("node %d of the trial would have the head's address %s; choose fewer nodes or another network.head", id, m.Address)
		}
		machines = append(machines, m)
	}
	return machines, nil
}

// Table returns the machines as the node table that the trial's head serves
// from: without it, machines that boot at once would get their ids in the order
// they happen to ask.
func Table(machines []Machine) []configs.Node {
	var table []configs.Node
	for _, m := range machines {
		table = append(table, configs.Node{
			MAC: configs.MAC(m.MAC.String()), ID: m.ID, Hostname: m.Hostname, Address: m.Address,
		})
	}
	return table
}
