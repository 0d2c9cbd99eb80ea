package cmdline

import (
	"fmt"
	"strings"
)

// NodesFile is Kerrighed's /etc/kerrighed_nodes, from which a node without
// ids on its command line takes them:
//
//	session=N
//	nbmin=N
//	HOSTNAME:NODEID[:NETDEV]
//
// Text from # to the end of a line is a comment; guides of the time show it.
type NodesFile struct {
	SessionID int // or Unset
	NodesMin  int // or Unset
	Nodes     map[string]int
	Problems  []error
}

// ParseNodesFile reads the text of a nodes file; bad lines become Problems.
func ParseNodesFile(text string) NodesFile {
	f := NodesFile{SessionID: Unset, NodesMin: Unset, Nodes: map[string]int{}}
	n := 0
	for line := range strings.Lines(text) {
		n++
		line, _, _ = strings.Cut(line, "#")
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		if err := f.add(line); err != nil {
			f.Problems = append(f.Problems, fmt.Errorf("/etc/kerrighed_nodes:%d: %q: %w", n, line, err))
		}
	}
	return f
}

func (f *NodesFile) add(line string) (err error) {
	if v, ok := strings.CutPrefix(line, "session="); ok {
		f.SessionID, err = number(v, MinSession, MaxSession)
		return err
	}
	if v, ok := strings.CutPrefix(line, "nbmin="); ok {
		f.NodesMin, err = number(v, 0, MaxNode+1)
		return err
	}
	host, rest, ok := strings.Cut(line, ":")
	if !ok || host == "" {
		return fmt.Errorf("want HOSTNAME:NODEID[:NETDEV], session=N or nbmin=N")
	}
	id, _, _ := strings.Cut(rest, ":")
	nodeID, err := number(strings.TrimSpace(id), 0, MaxNode)
	if err != nil {
		return err
	}
	f.Nodes[host] = nodeID
	return nil
}

// Fill completes id from the file. The node is looked up under each of the
// host names in turn: the root's /etc/hostname first, as Kerrighed did, then
// the name that DHCP gave, since on a shared root all nodes have one
// /etc/hostname.
func (f NodesFile) Fill(id Identity, hostnames ...string) Identity {
	if id.SessionID == Unset {
		id.SessionID = f.SessionID
	}
	for _, h := range hostnames {
		if id.NodeID != Unset {
			break
		}
		if n, ok := f.Nodes[h]; ok && h != "" {
			id.NodeID = n
		}
	}
	return id
}
