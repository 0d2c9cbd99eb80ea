package lease

import (
	"fmt"
	"net"
	"strings"

	"github.com/vishvananda/netlink"
)

// Apply puts the lease's address, route and MTU on its interface. It replaces
// what is there, so it may be called again.
func (l Lease) Apply() error {
	link, err := netlink.LinkByName(l.Interface)
	if err != nil {
		return fmt.Errorf("interface %s: %w", l.Interface, err)
	}
	if l.MTU > 0 && l.MTU != link.Attrs().MTU {
		// A server may name an MTU that the card can't do; the default works.
		_ = netlink.LinkSetMTU(link, l.MTU)
	}
	ipnet := &net.IPNet{IP: l.Address.Addr().AsSlice(), Mask: net.CIDRMask(l.Address.Bits(), 32)}
	// No lifetimes: the kernel must not remove the address when a lease ends.
	if err := netlink.AddrReplace(link, &netlink.Addr{IPNet: ipnet}); err != nil {
		return fmt.Errorf("set address %s on %s: %w", l.Address, l.Interface, err)
	}
	if l.Router.IsValid() {
		route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: l.Router.AsSlice()}
		if err := netlink.RouteReplace(route); err != nil {
			return fmt.Errorf("set default route by %s: %w", l.Router, err)
		}
	}
	return nil
}

// ResolvConf is the text of resolv.conf(5) for the lease.
func (l Lease) ResolvConf() string {
	var b strings.Builder
	if l.Domain != "" {
		fmt.Fprintf(&b, "search %s\n", l.Domain)
	}
	for _, d := range l.DNS {
		fmt.Fprintf(&b, "nameserver %s\n", d)
	}
	return b.String()
}
