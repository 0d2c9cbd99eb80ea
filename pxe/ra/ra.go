// Package ra answers IPv6 router solicitations with an advertisement that
// advertises nothing (RFC 4861 §4.2: router lifetime 0, no flags, no prefix).
//
// Why a head node that speaks only IPv4 does so: iPXE solicits routers after its
// DHCP and waits some 13 seconds when nobody answers. The empty answer tells it,
// and any other machine, that there is no router, which is the truth.
//
// Reply turns a solicitation into the answer, frame to frame, so that a real
// link (Listener) and a virtual network can use it. It never makes anybody use
// the head as a router, and it answers nothing but solicitations.
package ra

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
)

// Sizes and numbers of the headers (RFC 8200 §3, RFC 4861 §4.1 and §4.2).
const (
	ethernetLen = 14
	ipv6Len     = 40
	solicitLen  = 8  // type, code, checksum, reserved
	advertLen   = 16 // type, code, checksum, hop limit, flags, lifetime, two timers

	etherTypeIPv6 = 0x86dd
	protoICMPv6   = 58
	typeSolicit   = 133
	typeAdvert    = 134
	optSourceLink = 1
	optTargetLen  = 8 // source link-layer address option
	hopLimit      = 255
)

var (
	allNodes      = netip.MustParseAddr("ff02::1")
	allNodesMAC   = net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}
	allRoutersMAC = net.HardwareAddr{0x33, 0x33, 0, 0, 0, 2}
)

// Reply returns the Ethernet frame that answers a router solicitation, or nil if
// frame is no valid one. The answer comes from the Ethernet address router.
func Reply(frame []byte, router net.HardwareAddr) []byte {
	src, mac, ok := solicitation(frame)
	if !ok || len(router) != 6 {
		return nil
	}
	// RFC 4861 §6.2.6: a solicitation from the unspecified address can only be
	// answered to everybody.
	dst := src
	if src.IsUnspecified() {
		dst, mac = allNodes, allNodesMAC
	}
	return advertisement(router, mac, dst)
}

// solicitation checks a frame as RFC 4861 §6.1.1 demands and says who asks.
func solicitation(frame []byte) (src netip.Addr, mac net.HardwareAddr, ok bool) {
	if len(frame) < ethernetLen+ipv6Len+solicitLen || binary.BigEndian.Uint16(frame[12:]) != etherTypeIPv6 {
		return src, nil, false
	}
	mac, packet := net.HardwareAddr(frame[6:12]), frame[ethernetLen:]
	length := int(binary.BigEndian.Uint16(packet[4:]))
	if packet[0]>>4 != 6 || packet[6] != protoICMPv6 || packet[7] != hopLimit ||
		length < solicitLen || ipv6Len+length > len(packet) {
		return src, nil, false
	}
	message := packet[ipv6Len : ipv6Len+length]
	src = netip.AddrFrom16([16]byte(packet[8:24]))
	dst := netip.AddrFrom16([16]byte(packet[24:40]))
	if message[0] != typeSolicit || message[1] != 0 || checksum(src, dst, message) != 0 {
		return src, nil, false
	}
	if mac[0]&1 != 0 || src.IsMulticast() || !(src.IsUnspecified() || src.IsLinkLocalUnicast()) {
		return src, nil, false // no host asks from such an address
	}
	for options := message[solicitLen:]; len(options) > 0; {
		if len(options) < 2 || options[1] == 0 || int(options[1])*8 > len(options) {
			return src, nil, false
		}
		if options[0] == optSourceLink && src.IsUnspecified() {
			return src, nil, false
		}
		options = options[int(options[1])*8:]
	}
	return src, mac, true
}

// advertisement builds the frame of an empty router advertisement.
func advertisement(router, mac net.HardwareAddr, dst netip.Addr) []byte {
	src := linkLocal(router)

	message := make([]byte, advertLen, advertLen+optTargetLen)
	message[0] = typeAdvert // everything else 0: unspecified hop limit, no flags, no lifetime, no timers
	message = append(message, optSourceLink, 1)
	message = append(message, router...)
	binary.BigEndian.PutUint16(message[2:], checksum(src, dst, message))

	var b bytes.Buffer
	b.Write(mac)
	b.Write(router)
	b.Write([]byte{etherTypeIPv6 >> 8, etherTypeIPv6 & 0xff})
	b.Write([]byte{6 << 4, 0, 0, 0, byte(len(message) >> 8), byte(len(message)), protoICMPv6, hopLimit})
	b.Write(src.AsSlice())
	b.Write(dst.AsSlice())
	b.Write(message)
	return b.Bytes()
}

// linkLocal is an address of our own derived from the Ethernet address. It is
// not the modified EUI-64 of RFC 4291: that one may be the host's real address,
// and should the head be an IPv6 router after all, an advertisement with
// lifetime 0 from there would take its real routes away.
func linkLocal(mac net.HardwareAddr) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: 'k', 9: 'r', 10: mac[0], 11: mac[1], 12: mac[2], 13: mac[3], 14: mac[4], 15: mac[5]})
}

// checksum is the Internet checksum over the pseudo header of RFC 8200 §8.1 and
// the message; over a message that holds its checksum it is 0.
func checksum(src, dst netip.Addr, message []byte) uint16 {
	var sum uint32
	add := func(b []byte) {
		for ; len(b) >= 2; b = b[2:] {
			sum += uint32(binary.BigEndian.Uint16(b))
		}
		if len(b) == 1 {
			sum += uint32(b[0]) << 8
		}
	}
	add(src.AsSlice())
	add(dst.AsSlice())
	sum += uint32(len(message)) + protoICMPv6
	add(message)
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
