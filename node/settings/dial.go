package settings

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Ports that only root may use, as the kernel's NFS client takes them.
const (
	firstPort = 700
	lastPort  = 1023
)

// dialAsRoot connects from a port that no user of the node can use: by that the
// head tells the node from its users, who have the same address. Without the
// privilege it connects all the same.
func dialAsRoot(ctx context.Context, network, address string) (net.Conn, error) {
	start := rand.IntN(lastPort - firstPort + 1)
	for i := range lastPort - firstPort + 1 {
		d := net.Dialer{
			LocalAddr: &net.TCPAddr{Port: firstPort + (start+i)%(lastPort-firstPort+1)},
			// A port of a connection that has just ended can be taken again.
			Control: func(_, _ string, c syscall.RawConn) (err error) {
				if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) }); e != nil {
					return e
				}
				return err
			},
		}
		conn, err := d.DialContext(ctx, network, address)
		switch {
		case errors.Is(err, unix.EADDRINUSE) || errors.Is(err, unix.EADDRNOTAVAIL):
			continue
		case errors.Is(err, unix.EACCES):
			return (&net.Dialer{}).DialContext(ctx, network, address)
		}
		return conn, err
	}
	return nil, fmt.Errorf("every port from %d to %d is in use", firstPort, lastPort)
}

// BootID is the kernel's name of this boot: random, new each time the machine
// starts.
func BootID() (string, error) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(text)), err
}
