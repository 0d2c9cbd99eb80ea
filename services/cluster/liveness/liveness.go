// Package liveness makes the kernel watch the other end of a TCP connection:
// a machine that is gone ends the connection within the time-out, while a
// machine that is merely busy answers by its kernel and keeps it.
package liveness

import (
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// Setter is a connection that isn't the kernel's, for example one of a virtual
// network, and can be watched alike.
type Setter interface {
	SetLiveness(timeout time.Duration) error
}

// Watch ends conn when the other machine's kernel hasn't acknowledged anything
// for the time-out. The kernel asks an idle peer once a second (tcp(7):
// TCP_KEEPIDLE and TCP_KEEPINTVL count in whole seconds), so that a time-out
// of two seconds is the shortest there is.
func Watch(conn net.Conn, timeout time.Duration) error {
	switch c := conn.(type) {
	case Setter:
		return c.SetLiveness(timeout)
	case *net.TCPConn:
		err := c.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: time.Second, Interval: time.Second, Count: max(2, int(timeout/time.Second))})
		if err != nil {
			return fmt.Errorf("watch a connection: %w", err)
		}
		raw, err := c.SyscallConn()
		if err != nil {
			return fmt.Errorf("watch a connection: %w", err)
		}
		// A probe that is due exactly at the time-out must find it expired.
		limit := int((timeout - 50*time.Millisecond) / time.Millisecond)
		cerr := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, limit)
		})
		if err = errors.Join(cerr, err); err != nil {
			return fmt.Errorf("watch a connection: %w", err)
		}
		return nil
	}
	return nil // a connection within the process
}

// Listener watches every connection that it accepts.
func Listener(l net.Listener, timeout time.Duration) net.Listener { return listener{l, timeout} }

type listener struct {
	net.Listener
	timeout time.Duration
}

func (l listener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if Watch(conn, l.timeout) == nil {
			return conn, nil
		}
		conn.Close() // it has ended already
	}
}
