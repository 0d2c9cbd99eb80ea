// Package sunrpc is ONC RPC version 2 (RFC 5531) for the small protocols around
// file locking: rpcbind, NSM and NLM. It has XDR, a server for TCP, UDP and unix
// sockets, and a client for one call at a time.
//
// The file server has its own, in nfsroot/nfs: a MiB a call and thousands of
// calls at once ask for pooled buffers and for answers out of order. Here a
// call is a few hundred bytes, and those of one connection are worked on in the
// order in which they came, because an unlock must not overtake its lock.
package sunrpc

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
)

// Program numbers (RFC 1833, RFC 1813, X/Open XNFS).
const (
	ProgramRPCBind = 100000
	ProgramNFS     = 100003
	ProgramMount   = 100005
	ProgramNLM     = 100021
	ProgramNSM     = 100024
)

// maxMessage is the longest message in bytes, without its record mark. The
// largest call, an NLM lock with every field at its limit, has below 4 KiB; a
// DUMP of a busy rpcbind has more.
const maxMessage = 64 << 10

const (
	version = 2

	msgCall  = 0
	msgReply = 1

	replyAccepted = 0
	replyDenied   = 1

	rejectVersion = 0
	rejectAuth    = 1
	authBadCred   = 1

	flavorNone = 0
	flavorSys  = 1
)

// Accept is how a server took a call (RFC 5531 section 9, accept_stat).
type Accept uint32

// What a server says of a call.
const (
	Success      Accept = 0
	ProgUnavail  Accept = 1
	ProgMismatch Accept = 2
	ProcUnavail  Accept = 3
	GarbageArgs  Accept = 4
	SystemErr    Accept = 5
)

func (a Accept) String() string {
	switch a {
	case Success:
		return "success"
	case ProgUnavail:
		return "program not served"
	case ProgMismatch:
		return "program version not served"
	case ProcUnavail:
		return "procedure not served"
	case GarbageArgs:
		return "arguments not understood"
	case SystemErr:
		return "internal error"
	}
	return fmt.Sprintf("accept status %d", uint32(a))
}

// Error is an answer that is not Success.
type Error struct{ Accept Accept }

func (e *Error) Error() string { return "RPC: " + e.Accept.String() }

// ErrMessage says that a message makes no sense.
var ErrMessage = errors.New("malformed RPC message")

// nobody is who a call without credentials comes from.
const nobody = 65534

// Cred is who a call says to come from (AUTH_SYS, RFC 5531 appendix A).
type Cred struct {
	UID, GID uint32
	Groups   []uint32
}

// Call is one call that a server got.
type Call struct {
	XID, Prog, Vers, Proc uint32
	Cred                  Cred
	Peer                  netip.AddrPort // not valid for a unix socket
	Local                 netip.Addr     // where the call came in, if that is known
	Privileged            bool           // from a port below 1024, or from root through a unix socket
	Args                  *Decoder
	Reply                 *Encoder
}

// Loopback says whether the call came from this machine.
func (c *Call) Loopback() bool { return !c.Peer.IsValid() || c.Peer.Addr().IsLoopback() }

// Program is what a server serves. Handle decodes the arguments and fills in
// the reply; it must not block, for it holds up its connection.
type Program struct {
	Number    uint32
	Low, High uint32 // versions
	Handle    func(*Call) Accept
}

// answer does a call and returns the whole reply, nil when the message can't be
// answered. call has the connection's part filled in.
func answer(programs []Program, message []byte, call *Call, panicked func(any)) []byte {
	d := &Decoder{b: message}
	call.XID = d.Uint32()
	if typ := d.Uint32(); d.bad || typ != msgCall {
		return nil
	}
	e := &Encoder{}
	e.Uint32(call.XID)
	e.Uint32(msgReply)
	if vers := d.Uint32(); vers != version || d.bad {
		if d.bad {
			return nil
		}
		e.Uint32(replyDenied)
		e.Uint32(rejectVersion)
		e.Uint32(version)
		e.Uint32(version)
		return e.b
	}
	call.Prog, call.Vers, call.Proc = d.Uint32(), d.Uint32(), d.Uint32()
	flavor, cred := d.Uint32(), d.Opaque(400)
	d.Uint32() // the verifier: flavor and body
	d.Opaque(400)
	if d.bad {
		return nil
	}
	call.Cred = Cred{UID: nobody, GID: nobody}
	good := flavor == flavorNone
	if flavor == flavorSys {
		call.Cred, good = parseCred(cred)
	}
	if !good {
		e.Uint32(replyDenied)
		e.Uint32(rejectAuth)
		e.Uint32(authBadCred)
		return e.b
	}
	e.Uint32(replyAccepted)
	e.Uint32(flavorNone)
	e.Uint32(0)
	at := len(e.b)
	call.Args, call.Reply = d, e
	accept, low, high := dispatch(programs, call, panicked)
	if accept == Success {
		return e.b
	}
	e.b = e.b[:at]
	e.Uint32(uint32(accept))
	if accept == ProgMismatch {
		e.Uint32(low)
		e.Uint32(high)
	}
	return e.b
}

func dispatch(programs []Program, call *Call, panicked func(any)) (accept Accept, low, high uint32) {
	defer func() {
		if v := recover(); v != nil {
			panicked(v)
			accept = SystemErr
		}
	}()
	for i := range programs {
		p := &programs[i]
		if p.Number != call.Prog {
			continue
		}
		if call.Vers < p.Low || call.Vers > p.High {
			return ProgMismatch, p.Low, p.High
		}
		call.Reply.Uint32(uint32(Success))
		return p.Handle(call), 0, 0
	}
	return ProgUnavail, 0, 0
}

func parseCred(b []byte) (Cred, bool) {
	d := Decoder{b: b}
	d.Uint32()    // stamp
	d.Opaque(255) // machine name: a client may claim any
	c := Cred{UID: d.Uint32(), GID: d.Uint32()}
	n := d.Uint32()
	if d.bad || n > 16 || len(d.b) != int(n)*4 {
		return Cred{UID: nobody, GID: nobody}, false
	}
	for range n {
		c.Groups = append(c.Groups, d.Uint32())
	}
	return c, true
}

// readMessage reads one record (RFC 5531 section 11) in any number of
// fragments. io.EOF is a clean end between records.
func readMessage(r io.Reader) ([]byte, error) {
	var message []byte
	for fragments := 1; ; fragments++ {
		var mark [4]byte
		if _, err := io.ReadFull(r, mark[:]); err != nil {
			if fragments > 1 && errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
		head := binary.BigEndian.Uint32(mark[:])
		n := int(head &^ (1 << 31))
		if n > maxMessage-len(message) || fragments > 64 {
			return nil, fmt.Errorf("%w: longer than %d bytes or in more than 64 fragments", ErrMessage, maxMessage)
		}
		at := len(message)
		message = append(message, make([]byte, n)...)
		if _, err := io.ReadFull(r, message[at:]); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
		if head>>31 == 1 {
			return message, nil
		}
	}
}

func writeMessage(w io.Writer, message []byte) error {
	b := make([]byte, 0, 4+len(message))
	b = binary.BigEndian.AppendUint32(b, 1<<31|uint32(len(message)))
	_, err := w.Write(append(b, message...))
	return err
}

// addrPort is a socket address of package net without IPv4-mapped forms; it is
// not valid for a unix socket.
func addrPort(a net.Addr) netip.AddrPort {
	var ap netip.AddrPort
	switch a := a.(type) {
	case *net.TCPAddr:
		ap = a.AddrPort()
	case *net.UDPAddr:
		ap = a.AddrPort()
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
