package stage1

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"krgimage/node/bootlog"
	"krgimage/node/cmdline"
	"krgimage/node/lease"
	"krgimage/node/rescue"
	"krgimage/node/retry"
)

// linkPatience is how often a node that has no link says what it waits for.
const linkPatience = 5 * time.Second

// getLease brings up the interface that the firmware booted from, or else all
// physical ones, asks for a lease on each that has a carrier, and configures
// the first that gets one. It waits for ever: for a driver, a cable, a server.
func getLease(ctx context.Context, log *slog.Logger, timeline *bootlog.Timeline, c cmdline.Cmdline) (lease.Lease, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if lo, err := netlink.LinkByName("lo"); err == nil {
		_ = netlink.LinkSetUp(lo)
	}
	updates := make(chan netlink.LinkUpdate, 64)
	lost := make(chan error, 1)
	err := netlink.LinkSubscribeWithOptions(updates, ctx.Done(), netlink.LinkSubscribeOptions{
		ListExisting:  true,
		ErrorCallback: func(err error) { lost <- err },
	})
	if err != nil {
		return lease.Lease{}, fmt.Errorf("watch network interfaces: %w", err)
	}

	leases := make(chan lease.Lease)
	asking := map[int]bool{}       // by interface index
	seen := map[int]netlink.Link{} // the last word on each physical interface
	tick := time.NewTicker(linkPatience)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return lease.Lease{}, ctx.Err()
		case err := <-lost:
			if ctx.Err() == nil {
				return lease.Lease{}, fmt.Errorf("watch network interfaces: %w", err)
			}
		case l := <-leases:
			if err := l.Apply(); err != nil {
				return lease.Lease{}, err
			}
			return l, nil
		case u, ok := <-updates:
			if !ok {
				return lease.Lease{}, fmt.Errorf("watch network interfaces: the kernel closed the socket")
			}
			a := u.Attrs()
			if u.Header.Type == unix.RTM_DELLINK {
				delete(seen, a.Index)
				continue
			}
			if !physical(a.Name) {
				continue
			}
			seen[a.Index] = u.Link
			if !chosen(c, a) {
				continue
			}
			if a.Flags&net.FlagUp == 0 {
				if err := netlink.LinkSetUp(u.Link); err != nil {
					log.Warn("interface doesn't come up", "interface", a.Name, "mac", a.HardwareAddr, "err", err)
				}
				continue
			}
			if asking[a.Index] || a.RawFlags&unix.IFF_LOWER_UP == 0 {
				continue
			}
			if len(asking) == 0 {
				timeline.Reached(bootlog.StageLink, strings.TrimSpace(a.Name+" "+speed(a.Name)))
			}
			asking[a.Index] = true
			go ask(ctx, log, a.Name, a.HardwareAddr, leases)
		case <-tick.C:
			if len(asking) == 0 {
				log.Warn("no network link yet: " + waitingFor(c, seen))
			}
		}
	}
}

// physical tells a card from a bridge, a tunnel and the like.
func physical(name string) bool {
	_, err := os.Stat(filepath.Join("/sys/class/net", name, "device"))
	return err == nil
}

// chosen reports whether the command line lets the node boot from a.
func chosen(c cmdline.Cmdline, a *netlink.LinkAttrs) bool {
	if c.BootIF != nil {
		return bytes.Equal(a.HardwareAddr, c.BootIF) || bytes.Equal(a.PermHWAddr, c.BootIF)
	}
	return c.Device == "" || a.Name == c.Device
}

// waitingFor says what is missing: the card or its cable.
func waitingFor(c cmdline.Cmdline, seen map[int]netlink.Link) string {
	var there []string
	match := false
	for _, l := range seen {
		a := l.Attrs()
		state := "no carrier"
		if !chosen(c, a) {
			state = "not the boot interface"
		} else {
			match = true
		}
		there = append(there, fmt.Sprintf("%s %s (%s)", a.Name, a.HardwareAddr, state))
	}
	list := strings.Join(there, ", ")
	switch {
	case len(there) == 0:
		return "the kernel sees no network card; is its driver in the initramfs (initramfs.modules in cluster.yaml)?"
	case !match && c.BootIF != nil:
		return fmt.Sprintf("no interface has the address %s of BOOTIF; there are: %s", c.BootIF, list)
	case !match:
		return fmt.Sprintf("no interface is called %s (ip=); there are: %s", c.Device, list)
	}
	return list + "; check the cable and the switch port"
}

// speed is for people: "1000 Mb/s", or nothing when the card doesn't tell.
func speed(name string) string {
	text, err := os.ReadFile(filepath.Join("/sys/class/net", name, "speed"))
	s := strings.TrimSpace(string(text))
	if err != nil || s == "" || s[0] == '-' {
		return ""
	}
	return s + " Mb/s"
}

// ask sends the first lease it gets on one interface, however long that takes.
func ask(ctx context.Context, log *slog.Logger, name string, mac net.HardwareAddr, leases chan<- lease.Lease) {
	client := lease.Client{Interface: name, MAC: mac, Log: log, Uptime: bootlog.Uptime}
	patience := retry.Backoff{Min: 4 * time.Second, Max: 16 * time.Second}
	wait := retry.Backoff{Min: time.Second, Max: 16 * time.Second, Jitter: 1}
	_ = retry.Do(ctx, retry.System{}, wait, func(ctx context.Context, attempt int) error {
		return rescue.Guard(func() error {
			l, err := client.Acquire(ctx, patience.Next())
			if err != nil {
				return err
			}
			select {
			case leases <- l:
			case <-ctx.Done():
			}
			return nil
		})
	}, func(err error, wait time.Duration) {
		log.Warn("no address yet; asking again", "interface", name, "mac", mac, "err", err, "again_in", wait.Round(100*time.Millisecond))
	})
}
