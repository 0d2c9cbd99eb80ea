package ra

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Listener answers the solicitations of a real link. It works on whole frames
// (a packet socket), so it does not matter whether the host itself has IPv6
// switched on there.
type Listener struct {
	ifi  *net.Interface
	file *os.File
}

// Listen opens the packet socket; that takes CAP_NET_RAW.
func Listen(ifi *net.Interface) (*Listener, error) {
	if len(ifi.HardwareAddr) != 6 {
		return nil, fmt.Errorf("interface %s has no Ethernet address", ifi.Name)
	}
	// Protocol 0: no frame is received until the filter is in place.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("packet socket on %s: %w", ifi.Name, err)
	}
	if err := setUp(fd, ifi); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("packet socket on %s: %w", ifi.Name, err)
	}
	return &Listener{ifi, os.NewFile(uintptr(fd), "packet:"+ifi.Name)}, nil
}

func setUp(fd int, ifi *net.Interface) error {
	raw, err := bpf.Assemble(solicitationFilter)
	if err != nil {
		return err
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, ins := range raw {
		filter[i] = unix.SockFilter{Code: ins.Op, Jt: ins.Jt, Jf: ins.Jf, K: ins.K}
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog); err != nil {
		return fmt.Errorf("attach the filter: %w", err)
	}
	// Without the membership the interface may drop the group's frames itself.
	group := unix.PacketMreq{Ifindex: int32(ifi.Index), Type: unix.PACKET_MR_MULTICAST, Alen: 6}
	copy(group.Address[:], allRoutersMAC)
	if err := unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &group); err != nil {
		return fmt.Errorf("join the group of all routers: %w", err)
	}
	protocol := binary.NativeEndian.Uint16([]byte{etherTypeIPv6 >> 8, etherTypeIPv6 & 0xff})
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: ifi.Index}); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	return nil
}

// solicitationFilter lets only ICMPv6 router solicitations through, so that the
// head's other traffic is never copied. Reply does the real checking.
var solicitationFilter = []bpf.Instruction{
	bpf.LoadAbsolute{Off: 12, Size: 2},
	bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: etherTypeIPv6, SkipTrue: 5},
	bpf.LoadAbsolute{Off: ethernetLen + 6, Size: 1},
	bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: protoICMPv6, SkipTrue: 3},
	bpf.LoadAbsolute{Off: ethernetLen + ipv6Len, Size: 1},
	bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: typeSolicit, SkipTrue: 1},
	bpf.RetConstant{Val: 2048},
	bpf.RetConstant{Val: 0},
}

// Serve answers until ctx ends, and closes the listener.
func (l *Listener) Serve(ctx context.Context, log *slog.Logger) error {
	defer context.AfterFunc(ctx, func() { l.file.Close() })()
	defer l.file.Close()
	frame := make([]byte, 2048)
	for {
		n, err := l.file.Read(frame)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENETDOWN):
			// The link is down for now; the socket lives on.
			log.Warn("link is down: router solicitations go unanswered", "interface", l.ifi.Name)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(time.Second):
			}
			continue
		case err != nil:
			return fmt.Errorf("router advertisements on %s: %w", l.ifi.Name, err)
		}
		answer := Reply(frame[:n], l.ifi.HardwareAddr)
		if answer == nil {
			continue
		}
		if _, err := l.file.Write(answer); err != nil && ctx.Err() == nil {
			log.Warn("router solicitation not answered", "interface", l.ifi.Name, "err", err)
		}
	}
}
