package configs

import (
	"fmt"
	"net/netip"
	"time"
)

// Default returns the configuration of an empty cluster.yaml: every field has
// the value that `krgimage config show` prints for it.
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
			Lease:    Duration(12 * time.Hour),
		},
		Boot:  Boot{BIOS: "ipxe", Chain: "auto"},
		Nodes: Nodes{Unknown: "discover", IDs: []string{"1-253"}, Table: []Node{}},
		Users: []User{{Name: "krg", UID: 1000}},
		SSH:   SSH{Keys: []string{}},
		Trial: Trial{Nodes: 2, Memory: 512 << 20, CPUs: 1},
	}
}

// derive fills the fields whose default follows from another field.
func (c *Cluster) derive() {
	if !c.Network.Head.IsValid() && c.Network.Subnet.IsValid() && c.Network.Subnet.Addr().Is4() {
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
	for i := range c.Users {
		if c.Users[i].Shell == "" {
			c.Users[i].Shell = "/bin/bash"
		}
	}
}

// Hostname is the default host name of node id, for example "krg-3".
func (c *Cluster) Hostname(id int) string { return fmt.Sprintf("%s-%d", c.Name, id) }

// Address is the default address of node id: the subnet's address plus the id.
// It fails when that leaves the subnet.
func (c *Cluster) Address(id int) (netip.Addr, error) {
	if !c.Network.Subnet.IsValid() || !c.Network.Subnet.Addr().Is4() {
		return netip.Addr{}, fmt.Errorf("network.subnet is not an IPv4 subnet")
	}
	a := add4(c.Network.Subnet.Masked().Addr(), uint32(id))
	if id < 0 || !c.Network.Subnet.Contains(a) {
		return netip.Addr{}, fmt.Errorf("node id %d has no address in %s", id, c.Network.Subnet)
	}
	return a, nil
}

func lastUsable(p netip.Prefix) netip.Addr {
	hosts := uint32(1)<<(32-p.Bits()) - 1
	if p.Bits() >= 31 {
		return add4(p.Masked().Addr(), hosts)
	}
	return add4(p.Masked().Addr(), hosts-1)
}

func add4(a netip.Addr, n uint32) netip.Addr {
	b := a.As4()
	v := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
	v += n
	return netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)})
}
