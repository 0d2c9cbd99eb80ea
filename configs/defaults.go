package configs

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Default returns the configuration of an empty cluster.yaml before the fields
// that follow from others are filled in; Parse("", nil) has those too.
func Default() Cluster {
	return Cluster{
		Name:      "krg",
		SessionID: 1,
		Debian: Debian{
			Suite:      "trixie",
			Mirror:     "http://deb.debian.org/debian",
			Security:   "http://deb.debian.org/debian-security",
			Components: []string{"main"},
			Packages:   []string{},
		},
		Kernel: Kernel{
			Flavour: "amd64",
			Args:    []string{"console=tty0", "console=ttyS0,115200", "quiet"},
		},
		Initramfs: Initramfs{
			Modules:     []string{},
			Firmware:    []string{"firmware-realtek", "firmware-bnx2", "firmware-bnx2x"},
			RescueShell: true,
		},
		Network: Network{
			Subnet:   netip.MustParsePrefix("10.77.0.0/24"),
			DNS:      []netip.Addr{},
			HTTPPort: 80,
			NFSPort:  2049,

			ClusterPort: 7470,
			LinkPort:    7471,

			Lease: Duration(12 * time.Hour),
		},
		NFSRoot: NFSRoot{
			Port:    2049,
			Options: []string{},
			Exports: []Export{},
		},
		Boot:    Boot{BIOS: "ipxe", Chain: "auto"},
		Nodes:   Nodes{Unknown: "discover", IDs: []string{"1-253"}, Table: []Node{}},
		Cluster: Service{Start: "all", Store: Store{Kind: "embedded", Heads: []Head{}, URLs: []string{}}},
		Users:   []User{{Name: "krg", UID: 1000}},
		SSH:     SSH{Keys: []string{}},
		Trial:   Trial{Nodes: 2, Memory: 512 << 20, CPUs: 1},
	}
}

// derive fills the fields whose default follows from another field.
func (c *Cluster) derive() {
	if !c.Network.Head.IsValid() && c.hasSubnet() {
		c.Network.Head = lastUsable(c.Network.Subnet)
	}
	for i := range c.Nodes.Table {
		n := &c.Nodes.Table[i]
		if n.Hostname == "" {
			n.Hostname = c.Hostname(n.ID)
		}
		if !n.Address.IsValid() {
			n.Address, _ = c.Address(n.ID)
		}
	}
	if c.Nodes.IDs == nil {
		c.Nodes.IDs = c.freeIDs()
	}
	for i := range c.NFSRoot.Exports {
		if e := &c.NFSRoot.Exports[i]; e.Squash == "" {
			e.Squash = "none"
		}
	}
	for i := range c.Users {
		u := &c.Users[i]
		if u.Shell == "" {
			u.Shell = "/bin/bash"
		}
		if u.Keys == nil {
			u.Keys = []string{}
		}
		tidyKeys(u.Keys)
	}
	tidyKeys(c.SSH.Keys)
}

// tidyKeys takes off the newline that a YAML block text ends with and turns
// tabs into spaces.
func tidyKeys(keys []string) {
	for i := range keys {
		keys[i] = strings.TrimSpace(strings.ReplaceAll(keys[i], "\t", " "))
	}
}

// hasSubnet reports whether addresses can be computed at all.
func (c *Cluster) hasSubnet() bool {
	return c.Network.Subnet.IsValid() && c.Network.Subnet.Addr().Is4()
}

// freeIDs are the ranges of ids whose address is a host address of the subnet
// and nobody else's.
func (c *Cluster) freeIDs() []string {
	ranges, first := []string{}, -1
	for id := 0; id <= MaxNodeID+1; id++ {
		_, taken := c.addressOwner(id)
		if id <= MaxNodeID && !taken {
			if first < 0 {
				first = id
			}
			continue
		}
		if first >= 0 {
			ranges = append(ranges, formatRange(first, id-1))
		}
		first = -1
	}
	return ranges
}

// addressOwner says what keeps discovery from giving node id its address: that
// there is none, or whose it is already.
func (c *Cluster) addressOwner(id int) (owner string, taken bool) {
	a, err := c.Address(id)
	switch {
	case err != nil:
		return "outside the subnet", true
	case a == c.Network.Subnet.Masked().Addr():
		return "the network address", true
	case a == broadcast(c.Network.Subnet):
		return "the broadcast address", true
	case a == c.Network.Head:
		return "network.head", true
	case a == c.Network.Gateway:
		return "network.gateway", true
	case slices.Contains(c.Network.DNS, a):
		return "in network.dns", true
	}
	for i, n := range c.Nodes.Table {
		if n.Address == a && n.ID != id {
			return fmt.Sprintf("that of nodes.table[%d], node %d", i, n.ID), true
		}
	}
	return "", false
}

// Hostname is the default host name of node id, for example "krg-3".
func (c *Cluster) Hostname(id int) string { return fmt.Sprintf("%s-%d", c.Name, id) }

// Address is the default address of node id: the subnet's address plus the id.
// It fails when that leaves the subnet.
func (c *Cluster) Address(id int) (netip.Addr, error) {
	if !c.hasSubnet() {
		return netip.Addr{}, fmt.Errorf("network.subnet is not an IPv4 subnet")
	}
	a := add4(c.Network.Subnet.Masked().Addr(), uint32(id))
	if id < 0 || id > MaxNodeID || !c.Network.Subnet.Contains(a) {
		return netip.Addr{}, fmt.Errorf("node id %d has no address in %s", id, c.Network.Subnet)
	}
	return a, nil
}

// lastUsable is the address before the broadcast address, or the last one of a
// subnet too small to have one.
func lastUsable(p netip.Prefix) netip.Addr {
	if p.Bits() >= 31 {
		return broadcast(p)
	}
	return broadcast(p).Prev()
}

// broadcast is the last address of p.
func broadcast(p netip.Prefix) netip.Addr {
	return add4(p.Masked().Addr(), uint32(1)<<(32-p.Bits())-1)
}

func add4(a netip.Addr, n uint32) netip.Addr {
	b := a.As4()
	binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+n)
	return netip.AddrFrom4(b)
}
