package vnet

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"

	"golang.org/x/sync/errgroup"
)

// QEMU's `-netdev stream` sends each frame behind its length as a 32-bit
// big-endian number (QEMU net/stream.c, net/socket.c).

// errFraming: the stream can't be followed any further.
var errFraming = errors.New("broken framing")

// readFrame reads one frame. A runt is returned like any frame (the switch
// drops it); a length beyond MaxFrame means that the stream is out of step.
func readFrame(r io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > MaxFrame {
		return nil, fmt.Errorf("%w: a frame of %d bytes is announced, %d are allowed", errFraming, n, MaxFrame)
	}
	frame := make([]byte, n)
	if _, err := io.ReadFull(r, frame); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	return frame, nil
}

// writeFrame appends one frame to the stream.
func writeFrame(w *bufio.Writer, frame []byte) error {
	if _, err := w.Write(binary.BigEndian.AppendUint32(w.AvailableBuffer(), uint32(len(frame)))); err != nil {
		return err
	}
	_, err := w.Write(frame)
	return err
}

// serve accepts connections on l, one after the other, until ctx ends, and
// closes it.
func (p *Port) serve(ctx context.Context, l *net.UnixListener, log *slog.Logger) {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() == nil {
				log.Error("port stopped", "err", err)
			}
			return
		}
		log.Debug("guest connected")
		err = p.join(ctx, conn)
		switch {
		case ctx.Err() != nil:
		case errors.Is(err, errFraming):
			log.Warn("guest disconnected by the switch", "err", err)
		default:
			log.Debug("guest disconnected", "err", err)
		}
	}
}

// join carries frames between the stream and the port until one side ends,
// and closes the stream.
func (p *Port) join(ctx context.Context, conn io.ReadWriteCloser) error {
	// Frames from before the connection are for a guest that is gone.
	for len(p.out) > 0 {
		<-p.out
	}
	group, ctx := errgroup.WithContext(ctx)
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	defer conn.Close()
	group.Go(func() error {
		r := bufio.NewReaderSize(conn, 64<<10)
		for {
			frame, err := readFrame(r)
			if err != nil {
				if errors.Is(err, errFraming) {
					p.stats.malformed.Add(1)
				}
				return err
			}
			p.Send(frame)
		}
	})
	group.Go(func() error {
		w := bufio.NewWriterSize(conn, 64<<10)
		for {
			frame, err := p.Receive(ctx)
			if err != nil {
				return err
			}
			if err := writeFrame(w, frame); err != nil {
				return err
			}
			// Flush when nothing more waits: few writes under load, no delay
			// otherwise.
			if len(p.out) == 0 {
				if err := w.Flush(); err != nil {
					return err
				}
			}
		}
	})
	return group.Wait()
}
